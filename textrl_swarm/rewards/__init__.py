"""Rewards: the user's function, classifiers, sums of several, and their time limit."""
