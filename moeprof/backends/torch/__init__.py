"""The backend in torch: tensors on any device, in batched operations."""
