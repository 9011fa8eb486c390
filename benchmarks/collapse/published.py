"""What the paper (arXiv:2509.08972, version 4) prints, to stand beside what is measured here."""

# Knowledge retention of split 0 in percent, stages 0 to 5: Tables 6 to 9, one seed each.
RETENTION = {
    "LLaMA-3.2-1B, Wikitext": {
        "cross-entropy": (80.3, 77.9, 73.7, 71.3, 66.8, 64.3),
        "TCE 0.9": (81.5, 81.2, 76.6, 74.8, 71.2, 68.2),
        "TCE 0.99": (81.7, 78.5, 76.8, 72.5, 69.1, 66.2),
        "focal 2": (82.7, 80.1, 78.8, 74.6, 70.8, 68.1),
    },
    "Gemma-3-1b-pt, Wikitext": {
        "cross-entropy": (78.5, 74.6, 73.8, 72.1, 70.5, 65.2),
        "TCE 0.9": (79.7, 77.2, 75.2, 75.5, 68.6, 67.7),
        "TCE 0.99": (79.5, 75.1, 73.3, 71.9, 68.5, 69.7),
        "focal 2": (78, 74.9, 75.2, 72.7, 68.3, 66),
    },
    "LLaMA-3.2-1B, Imagination of Web": {
        "cross-entropy": (82.8, 74.6, 69, 67.7, 67.3, 66),
        "TCE 0.9": (82.3, 73.4, 72.3, 71.2, 72.1, 68.6),
        "TCE 0.99": (80.9, 75, 69.4, 69.5, 65.8, 65.5),
        "focal 2": (84, 80.2, 74.9, 75.5, 70.4, 69.1),
    },
    "Gemma-3-1b-pt, Imagination of Web": {
        "cross-entropy": (82.4, 78.1, 74.6, 72.2, 72.6, 68.2),
        "TCE 0.9": (83.3, 81.6, 80.8, 76.1, 72.6, 70),
        "TCE 0.99": (82.4, 81.4, 77, 78.8, 72.6, 73.3),
        "focal 2": (83, 78.7, 75.8, 75.3, 71.2, 69.1),
    },
}
MILLION_TOKENS = (0, 16, 48, 96, 160, 240)  # of synthetic text trained on, up to each stage
LEVEL = 75.0  # percent: what counts as failure

# Sigma of Fig. 2, read off its vector graphics, at these generations.
FIGURE_2_GENERATIONS = (0, 8, 16, 24, 32, 40, 48)
FIGURE_2 = {
    "all samples": (1.003, 0.429, 0.191, 0.082, 0.037, 0.016, 0.007),
    "TCE 0.85": (1.097, 1.053, 1.042, 0.998, 0.983, 0.945, 0.924),
    "TCE 0.80": (1.119, 1.259, 1.471, 1.652, 1.905, 2.160, 2.487),
}
