"""From run directories to tables, statistics, figures and one offline report page."""
