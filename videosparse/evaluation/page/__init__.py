"""The page about a comparison: one HTML file that needs nothing else. `build.py` puts it together."""
