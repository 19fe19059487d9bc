"""From run directories to tables, statistics, figures and one offline report page.

`load` reads run directories into tidy pandas tables; `stats` holds pure functions of those tables; `tables`
and `figures` shape results for people; `report` puts them on one page. Nothing here needs torch or a cluster.
"""
