"""The collapse laboratory: do models that are trained on their own output last longer with truncation?"""
