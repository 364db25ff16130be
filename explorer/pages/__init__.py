"""The pages: scripts that Streamlit runs, and what they share. Nothing else imports Streamlit."""
