"""The backend in torch: routing and experts on any device that torch runs on, with gradients."""
