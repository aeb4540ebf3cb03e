"""Any decoder-only model of transformers, cut into its blocks and the rest, without a line per family."""
