"""The losses in other people's training code: each test is left out where its framework is not installed."""
