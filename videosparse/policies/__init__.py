"""The methods: one file each, none knows a model."""
