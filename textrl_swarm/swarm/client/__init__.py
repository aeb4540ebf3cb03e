"""The client side: finding servers, calling them, and surviving their loss."""
