"""Reports of a run: the summary, and the other formats, such as HTML and Markdown, which are created
from the summary.
"""
