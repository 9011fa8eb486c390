"""Cases of the losses over several processes, and the processes that run them."""
