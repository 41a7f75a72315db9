SELECT * FROM session WHERE name = :name
