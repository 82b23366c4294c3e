"""Comparing methods on many prompts: what is run, how a video is judged, where rows are kept, the page about them."""
