"""What the methods reckon with beside the losses: pure functions of tensors. The losses are in `kernels`."""
