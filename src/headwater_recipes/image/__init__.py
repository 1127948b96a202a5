"""``headwater train image``: which of some classes is an image of?"""
