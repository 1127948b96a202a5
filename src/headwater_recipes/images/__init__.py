"""What recipes about images share: files to pixels, folders of classes, batches, pictures of what came of it.

``decode`` reads one image, ``folder`` a folder with a subfolder for each class and ``idx`` MNIST's file format;
``store`` is how a run folder keeps pixels and labels, ``batches`` draws and varies them, ``task`` is what tasks of such
folders have in common, ``pictures`` shows galleries, ``serving`` takes what a client sends.
"""
