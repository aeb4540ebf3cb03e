"""TextRL's interface, and the only code that imports pfrl and gym."""
