"""The losses in other people's training code. Each module needs the framework that it is named after."""
