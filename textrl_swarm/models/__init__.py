"""What a language model is before anything runs it: its files, its layers, its adapter and its size."""
