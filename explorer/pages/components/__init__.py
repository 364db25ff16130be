"""Parts of pages that Streamlit does not have."""
