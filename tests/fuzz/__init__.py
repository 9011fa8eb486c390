"""Random calls of the public losses against their definition: python -m tests.fuzz"""
