"""Every formula, as a function of tensors. Imports torch and nothing else."""
