"""Where tensors meet the kernels: the C backend, its operators in torch, the tables it reads."""
