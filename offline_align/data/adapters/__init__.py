"""The published forms of the data sets in the paper, turned into our SFT and preference rows."""
