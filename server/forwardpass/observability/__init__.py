"""What is counted and logged, and how it is read: metrics by model, of GPUs, and their export; limits on log lines."""
