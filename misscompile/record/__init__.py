"""What is known: the words that all rooms share, the record on an adapted module, and how both are found and put back."""
