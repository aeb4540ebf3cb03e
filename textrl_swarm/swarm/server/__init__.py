"""The server side: blocks that apply pushed adapters and return their gradients."""
