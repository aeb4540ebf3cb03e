"""Everything that touches petals and hivemind: what both ends share, and the servers of one machine."""
