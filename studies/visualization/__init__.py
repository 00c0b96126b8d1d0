"""Do pictures of features show more on traces? Pictures are painted, shown to other networks, and counted."""
