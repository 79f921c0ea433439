"""People as judge: the answers that they give about a stage's images on a page, and the server of that page."""
