"""What happens beside the training: samples to read, folders to export."""
