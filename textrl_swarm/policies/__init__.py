"""Language models with a trainable adapter and a value head, on this machine or through a swarm."""
