"""The CUDA execution provider: driver, page-locked buffers, graphs by batch size, a thread for each session."""
