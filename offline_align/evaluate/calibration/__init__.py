"""Can this judge be trusted? Its verdicts on pairs that people have judged, and how sure it may be of them."""
