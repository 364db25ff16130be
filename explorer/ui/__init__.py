"""What pages share: the frame, the address, filters, access, charts and colours, the token strip.

Together with ``app.py`` and the pages the only place that imports Streamlit; imports no page.
"""
