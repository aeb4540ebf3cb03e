"""Exports of a trained adapter: finding it, writing it, and checking it in a fresh process."""
