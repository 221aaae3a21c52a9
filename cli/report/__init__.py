"""`sousbatch report`: what ran, as one self-contained page.

`facts` derives them from events and `gather` reads them; `charts`, `timeline`, `storage` and `samples` draw one part
each, and `page` puts the parts together. The style and the script of the page are page.css and page.js.
"""
