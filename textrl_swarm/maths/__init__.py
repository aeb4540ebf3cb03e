"""Mathematics on tensors: sampling, returns and losses. Knows nothing about models, policies or files."""
