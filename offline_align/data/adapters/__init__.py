"""Convert the published forms of the paper's data sets into our SFT and preference rows."""
