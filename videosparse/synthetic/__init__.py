"""A small world of moving shapes with exact ground truth: scenes, their motion, their pixels and their captions.

Everything is a closed form of time, so a clip may start anywhere and a video of any length has a true answer.
"""
