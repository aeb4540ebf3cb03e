"""Everything that touches petals and hivemind: servers that train LoRA, and the client's chain of remote blocks."""
