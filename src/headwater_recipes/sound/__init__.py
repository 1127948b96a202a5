"""What recipes about sounds share: decoding, log-mel features, the network, its measures, baselines and pictures.

``decode`` turns a file or its bytes into samples of one rate and one channel and says what it did with odd ones;
``features`` makes log-mel spectrograms of them; ``examples`` holds those of many sounds in the run folder; ``network``
is the classifier; ``task`` is what recipes inherit; ``served`` answers for a run of any of them.
"""
