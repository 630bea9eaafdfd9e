"""Networks: families of ours (``zoo``), features of any network (``taps``), input handling, weights on disk.

Importing this package imports neither timm nor torchvision; they load with the first network that needs them.
"""
