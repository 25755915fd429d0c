print "Python 2"
cursor.execute("update users set total_coins = 0")  # = write
