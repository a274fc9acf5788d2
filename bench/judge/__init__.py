"""Judge a kernel: is it right, with which features, in which form, and what did no case look at?"""
