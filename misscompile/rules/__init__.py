"""Which sites a config chooses: its fields, the selection by names, and the defaults by model type. No torch."""
