"""Judge a kernel: is it right, with which features, in which form, and what did nobody look at?"""
