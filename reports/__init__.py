"""What a run found, for people: numbers to plot, figures, ``report.html``, terminal tables."""
