"""What a user calls, one file for each family of verbs."""
