"""Measures of generated videos: how close to another video, and how true to their prompt."""
