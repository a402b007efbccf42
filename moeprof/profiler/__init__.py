"""What a mixture of experts does while it runs: counts, times, and what follows from them."""
